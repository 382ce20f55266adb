"""Run configurations: schemas that nest the packages' specs, TOML files in layers, and where each value comes from.

from config.loading import load
from config.schemas import TrainConfig

loaded = load(TrainConfig, "my.toml", ["training.max_steps=100"])
loaded.config.training.max_steps, loaded.origins["training.max_steps"]
"""
