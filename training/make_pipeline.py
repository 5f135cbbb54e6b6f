"""`python -m training.make_pipeline`: what src/diffusers_far/training/make_pipeline.py does."""

import runpy

if __name__ == "__main__":
    runpy.run_module("diffusers_far.training.make_pipeline", run_name="__main__", alter_sys=True)
