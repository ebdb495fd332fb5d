"""No finding in an untrained network is serious: a part of the zoo; benchmarks/doctor.py has all of it."""

from __future__ import annotations

import pytest

from benchmarks import doctor
from benchmarks.zoo_images import IMAGES
from benchmarks.zoo_sequences import SEQUENCES

_ZOO = {**IMAGES, **SEQUENCES}


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("name", [*_ZOO][::6])
def test_untrained_networks_have_no_serious_finding(name: str) -> None:
    row = doctor._untrained(name, _ZOO[name])
    assert row["norms"] > 0
    assert not [kind for kind in row["findings"] if kind.startswith("serious")], row
    assert any(kind == "note never-updated" for kind in row["findings"])
