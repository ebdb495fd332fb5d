"""Handwritten digits in Keras, with callbacks that diagnose, monitor and calibrate batch normalizations."""

from keras import Input, Sequential, utils
from keras.layers import Dense, ReLU

from batchnorm.keras import BatchNormalization, Calibrate, Doctor, Monitor
from batchnorm.studies.data import load_digits

utils.set_random_seed(0)
digits = load_digits()
x_train, y_train = digits.x_train.reshape(-1, 784), digits.y_train
x_test, y_test = digits.x_test.reshape(-1, 784), digits.y_test
model = Sequential([Input((784,)), Dense(64), BatchNormalization(), ReLU(), Dense(10, "softmax")])
model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
callbacks = [Doctor(), Monitor("norms.csv", every=25), Calibrate(x_train, when="validation")]
validation = {"validation_data": (x_test, y_test), "verbose": 0}
history = model.fit(x_train, y_train, epochs=3, batch_size=64, callbacks=callbacks, **validation)
print(f"held-out accuracy: {history.history['val_accuracy'][-1]:.1%}")
