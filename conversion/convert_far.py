"""Convert published FAR checkpoints to a pipeline folder, and back; `--help` says how."""

from diffusers_far.cli import convert

if __name__ == "__main__":
    convert(prog_name="convert_far.py")
