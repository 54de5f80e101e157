"""The real operator as a subprocess, and objects to give it: for its integration tests and its benchmark."""
