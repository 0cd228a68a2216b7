"""The rooms that touch a model or the network; torch and friends are imported inside functions."""
