"""int8 by the tool of each runtime: calibrated on images, with the choice of tokens left float."""
