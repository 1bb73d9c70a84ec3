"""The noise of minibatch gradients: its covariance, what it does to trajectories, and where it leads."""
