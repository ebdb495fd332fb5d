"""Handwritten digits with Lightning, whose Trainer monitors and calibrates batch normalizations."""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from batchnorm import BatchNorm1d
from batchnorm.integrations.lightning import Calibrate, Monitor
from batchnorm.studies.data import load_digits


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, 64), BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
        self.configure_optimizers = lambda: torch.optim.Adam(self.parameters(), lr=0.003)
        self.forward = self.net.forward

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


pl.seed_everything(0, verbose=False)
digits = load_digits()
data = torch.utils.data.TensorDataset(torch.tensor(digits.x_train).flatten(1), torch.tensor(digits.y_train))
batches = torch.utils.data.DataLoader(data, batch_size=50, shuffle=True)
norms, log = [Monitor(every=50), Calibrate(batches)], pl.loggers.CSVLogger("runs")
pl.Trainer(max_epochs=3, accelerator="cpu", logger=log, callbacks=norms).fit(model := Classifier(), batches)
found = model.eval()(torch.tensor(digits.x_test).flatten(1)).argmax(1).numpy()
print(f"held-out accuracy: {(found == digits.y_test).mean():.1%}")
