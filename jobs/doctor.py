"""Before a paid run: is the cluster, or the file that makes one, fit for it?  Give the flags of the run.

    python jobs/doctor.py --cluster-file cluster.yaml       the file alone: filled in, valid for Ray, closed to the world
    python jobs/doctor.py --data URI --run URI              the cluster that RAY_ADDRESS or `ray start` names
    ray job submit --working-dir . -- python jobs/doctor.py --workers 4

Each line is pass, fail or skip, with the remedy.  The exit code is 0, or that of the first line that fails:
2 configuration or security, 4 data, 6 storage, 7 cluster.
"""

from collections.abc import Sequence
from dataclasses import replace

from raysed import cli
from raysed.cluster.checks import exit_code
from raysed.cluster.doctor import as_json, as_text, examine
from raysed.cluster.files import check_file
from raysed.config import Experiment
from raysed.io.storage import Storage


def job(argv: Sequence[str]) -> int:
    parser = cli.experiment_parser(__doc__, Experiment())
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--cluster-file", metavar="FILE", help="check a cluster.yaml or rayjob.yaml instead of a cluster"
    )
    args = parser.parse(argv)
    experiment, _ = cli.parse_experiment(args, Experiment())
    if args.cluster_file:
        lines = check_file(args.cluster_file, experiment)
    else:
        uri = experiment.data.uri and Storage(experiment.data.uri).uri
        run = experiment.run and Storage(experiment.run).uri
        lines = examine(replace(experiment, run=run, data=replace(experiment.data, uri=uri)))
    print(as_json(lines) if args.json else as_text(lines), flush=True)
    return exit_code(lines)


if __name__ == "__main__":
    cli.main(job)
