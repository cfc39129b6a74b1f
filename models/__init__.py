"""The networks and the losses: classifier, focal loss, distillation."""
