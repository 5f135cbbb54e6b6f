"""Standard measures by the protocols of published papers, of any pipeline with the call of FARVideoPipeline.

`protocols.py` has what a protocol prescribes, `clips.py` the real videos, `prediction.py` the calls,
`measures.py` what is measured of a clip, `results.py` the figures of all clips, `report.py` the page, and
`run.py` the command.
"""
