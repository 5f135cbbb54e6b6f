"""`python -m training.encode_latents`: what src/diffusers_far/training/encode_latents.py does."""

import runpy

if __name__ == "__main__":
    runpy.run_module("diffusers_far.training.encode_latents", run_name="__main__", alter_sys=True)
