"""Pre-training a detector's backbone by image classification: model, data and evaluation for the loop of train/."""
