"""`python -m training.train_autoencoder`: what src/diffusers_far/training/train_autoencoder.py does."""

import runpy

if __name__ == "__main__":
    runpy.run_module("diffusers_far.training.train_autoencoder", run_name="__main__", alter_sys=True)
