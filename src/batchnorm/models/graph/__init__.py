"""Who makes and who reads each value of a model's forward."""
