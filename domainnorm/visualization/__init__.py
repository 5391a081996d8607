"""Pictures of data and predictions, on torchvision's drawing and matplotlib."""
