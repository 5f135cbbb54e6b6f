"""`python -m training.train_far`: what src/diffusers_far/training/train_far.py does."""

import runpy

if __name__ == "__main__":
    runpy.run_module("diffusers_far.training.train_far", run_name="__main__", alter_sys=True)
