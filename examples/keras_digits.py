"""Handwritten digits in Keras, with batch normalization; on the backend that KERAS_BACKEND names."""

from keras import Input, Sequential, utils
from keras.layers import Dense

from batchnorm.keras import BatchNormalization  # was: from keras.layers import BatchNormalization
from batchnorm.studies.data import load_digits

utils.set_random_seed(0)
digits = load_digits()  # 2,500 images of 28 x 28 pixels in 0..1 to train on, 2,500 held out
x_train, y_train = digits.x_train.reshape(-1, 784), digits.y_train
x_test, y_test = digits.x_test.reshape(-1, 784), digits.y_test

model = Sequential(
    [Input((784,)), Dense(64, activation="relu"), BatchNormalization(), Dense(10, activation="softmax")]
)
model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
model.fit(x_train, y_train, epochs=10, batch_size=32, verbose=0)

loss, accuracy = model.evaluate(x_test, y_test, verbose=0)
print(f"held-out accuracy: {accuracy:.1%}")
