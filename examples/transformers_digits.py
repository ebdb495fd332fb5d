"""Handwritten digits with the Trainer of transformers, which calibrates and monitors batch normalizations."""

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from batchnorm import BatchNorm1d
from batchnorm.integrations.transformers import Calibrate, Monitor
from batchnorm.studies.data import load_digits


class Classifier(nn.Sequential):
    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = super().forward(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


set_seed(0)
digits = load_digits()
x, y, x_test, y_test = map(torch.tensor, (digits.x_train, digits.y_train, digits.x_test, digits.y_test))
samples = [{"x": image.flatten(), "labels": label} for image, label in zip(x, y, strict=True)]
batches = [{"x": x.flatten(1), "labels": y}]
model = Classifier(nn.Linear(784, 64), BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
arguments = TrainingArguments("runs", num_train_epochs=3, learning_rate=3e-3, per_device_train_batch_size=50)
trainer = Trainer(model, arguments, train_dataset=samples, callbacks=[Monitor(every=50), Calibrate(batches)])
trainer.train()
found = model.eval()(x_test.flatten(1), y_test)["logits"].argmax(1)
print(f"held-out accuracy: {(found == y_test).float().mean():.1%}")
