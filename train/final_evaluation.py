"""``python -m train test RUN``: computes the loss on the test split once, and records it.

No other program opens the test split. Each use adds a line to the run's ``test_reads.jsonl``. If
the checkpoint and stride are there already, the recorded loss is printed and nothing computed. An
unfinished run is refused, and so is a record that cannot be written: no loss is shown without it.
"""

from collections.abc import Sequence

from train.bucket import is_remote
from train.errors import UserError
from train.evaluate import append_evaluation, checked_stride, evaluate, parser
from train.load import load
from train.metrics import check_appendable, read_rows
from train.mirror import fetch_rows, send_back
from train.program import num_cores, start_jax
from train.run_files import TEST_READS


def program(argv: Sequence[str]) -> None:
    """Runs the program with the arguments of its command line."""
    options = parser(__doc__ or "", "python -m train test").parse_args(argv[1:])
    if is_remote(options.run):
        raise UserError(
            f"the test split is read once and each use recorded in the run's folder; copy "
            f"{options.run} to this machine, and the folder back afterwards"
        )
    start_jax(cpu_devices=num_cores())
    trained = load(options.run, which=options.checkpoint, data_path=options.data_path)
    trained.run.check_finished()
    stride = checked_stride(options.stride, trained.experiment)
    log = trained.run.path / TEST_READS
    fetch_rows(log, trained.experiment.mirror_dir)
    reads = read_rows(log)
    for row in reads:
        if (row["step"], row["stride"]) == (trained.step, stride):
            print(f"test {row['bpc']:.4f} BPC, read on {row['time']} (step {row['step']})")
            return
    if reads:
        print(f"note: this run's test split has been read {len(reads)} time(s) before; see {log}")
    check_appendable(log)
    result = evaluate(trained, trained.corpus.tokens("test", allow_test=True), stride=stride)
    append_evaluation(log, trained, result)
    print(f"test {result}")
    send_back(log, options.run, trained.experiment.mirror_dir)
