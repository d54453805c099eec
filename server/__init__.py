"""The server: the round loop, the run store and the commands `giva`."""
