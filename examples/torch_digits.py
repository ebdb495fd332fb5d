"""Handwritten digits in PyTorch, with batch normalization."""

import torch
from torch import nn

import batchnorm
from batchnorm.studies.data import load_digits

torch.manual_seed(0)
digits = load_digits()  # 2,500 images of 28 x 28 pixels in 0..1 to train on, 2,500 held out
x_train, y_train = torch.tensor(digits.x_train).flatten(1), torch.tensor(digits.y_train)
x_test, y_test = torch.tensor(digits.x_test).flatten(1), torch.tensor(digits.y_test)

model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), batchnorm.BatchNorm1d(64), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters())
for _ in range(10):  # epochs
    for batch in torch.randperm(len(x_train)).split(32):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x_train[batch]), y_train[batch]).backward()
        optimizer.step()

batchnorm.calibrate(model, x_train.split(500))  # running statistics := those of all training data
model.eval()
with torch.no_grad():
    accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
print(f"held-out accuracy: {accuracy:.1%}")
