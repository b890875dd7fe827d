"""Make maps of images with a trained network.

    python jobs/predict.py models/first --source imagery --target maps
    python jobs/predict.py s3://bucket/runs/first --source 's3://bucket/scenes/2024/**/*.tif' --target s3://bucket/maps --entropy

MODEL is a folder of jobs/export.py or a run.  A GeoTIFF gives a Cloud Optimized GeoTIFF with CRS, transform, nodata and palette,
and beside it the class names; a PNG or JPEG gives a PNG.  Images are brought to the scale of training, in metres a pixel where
model and image know it.  The same command again finishes what was interrupted and leaves finished maps alone.
"""

import json
import sys
from collections.abc import Sequence

from raysed.cli import Parser, main
from raysed.cluster.mapper import Settings
from raysed.cluster.predict import predict
from raysed.errors import DataError
from raysed.io.imagery import find_images, find_labels
from raysed.io.model import load_any


def job(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "model", metavar="MODEL", help="model folder or run: a local path or s3://bucket/prefix"
    )
    parser.add_argument(
        "--source", required=True, help="an image, a folder or s3:// prefix, a glob, or a .txt list of images"
    )
    parser.add_argument("--target", required=True, help="folder or s3:// prefix of the maps")
    parser.add_argument(
        "--labels", metavar="FOLDER", help="label files named as the images: the maps are scored with them"
    )
    parser.add_argument(
        "--entropy", action="store_true", help="also write the entropy: high where labels would help most"
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="also write the probability of every class, a byte each"
    )
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.25,
        help="share of a window that its neighbours see too (default: 0.25)",
    )
    parser.add_argument(
        "--cycle", type=int, help="of a run: number of the cycle's folder (default: the newest)"
    )
    parser.add_argument("--data", metavar="URI", help="of a run: its tile store, if it has moved")
    parser.add_argument(
        "--workers", type=int, help="actors (default: one a GPU or CPU, more as the cluster grows)"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="(default: auto, cuda where the cluster has a GPU or may start one)",
    )
    parser.add_argument(
        "--wait-nodes",
        type=float,
        metavar="SECONDS",
        help="to wait for room (default: 900 where an autoscaler can start nodes, 120 elsewhere)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="make all maps anew, in place of those of whatever model, settings or image",
    )
    parser.add_argument(
        "--shared-filesystem", action="store_true", help="all nodes of the cluster see the same files"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON line on standard output"
    )
    args = parser.parse(argv)
    settings = Settings(overlap=args.overlap, entropy=args.entropy, probabilities=args.probabilities)
    model = load_any(args.model, args.cycle, args.data)
    images = find_images(args.source, args.target)
    labels = find_labels(args.labels, images, model.record.classes) if args.labels else None

    def say(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    result = predict(
        model,
        images,
        args.target,
        settings,
        labels=labels,
        workers=args.workers,
        device=args.device,
        wait_nodes=args.wait_nodes,
        overwrite=args.overwrite,
        shared_filesystem=args.shared_filesystem,
        say=say,
    )
    if "metrics" in result:
        say("\n".join(table(result["metrics"])))
    if args.json:
        print(json.dumps(result))
    if result["bad"]:
        name, reason = next(iter(sorted(result["bad"].items())))
        raise DataError(
            f"{len(result['bad'])} of {len(images)} images cannot be used, the first is {name}: {reason}"
        )


def table(metrics: dict) -> list[str]:
    """One line a metric, then one a class."""
    plain = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
    classes = {f"  {k}": v for k, v in metrics["iou"].items()}
    return [
        f"{name:26s} {'none' if value is None else f'{value:.4f}' if isinstance(value, float) else value}"
        for name, value in (plain | classes).items()
    ]


if __name__ == "__main__":
    main(job)
