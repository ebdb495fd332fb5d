from tests.support.threads import _one_thread

__all__ = ["_one_thread"]
