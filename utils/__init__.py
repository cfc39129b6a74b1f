"""What the scripts share: settings, training loop, checkpoints, prediction, voting, report."""
