"""Names of files that several parts of the program look for."""

RECIPE = "recipe.yaml"
"""In a run folder: what it was told to do."""

TRAINABLE = "trainable.safetensors"
"""In a checkpoint: every trained tensor; of a run of `method: full` the whole model."""

MODEL_CONFIG = "config.json"
"""In a model's folder, as transformers writes it."""
