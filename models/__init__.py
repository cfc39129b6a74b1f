"""What is learned: the classifier, the focal loss, the distillation."""
