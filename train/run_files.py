"""The files of a run, by name.

::

    runs/<name>/
      config.json        all settings
      provenance.json    commit, packages, device, data hash: one entry a start
      vocabulary.json    what its tokens stand for
      parameters.txt     the parameter table
      metrics.jsonl      losses, exact          timing.jsonl   speed
      checkpoints/       Orbax                  tensorboard/
      loss.png  sample.txt  summary.json        when it ends
      evaluations.jsonl  test_reads.jsonl       of ``train evaluate`` and ``train test``
"""

CONFIG = "config.json"
PROVENANCE = "provenance.json"
VOCABULARY = "vocabulary.json"
PARAMETERS = "parameters.txt"
METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
SAMPLE = "sample.txt"
SUMMARY = "summary.json"
EVALUATIONS = "evaluations.jsonl"
TEST_READS = "test_reads.jsonl"

CHECKPOINTS = "checkpoints"
DAMAGED_CHECKPOINTS = "damaged_checkpoints"
LOCK = "lock"
