"""Cut images into a tile store that the other jobs train on.

    python jobs/prepare.py --source OpenEarthMap_wo_xBD --target s3://bucket/tiles
    python jobs/prepare.py --source imagery --target data/tiles --tile 256
    python jobs/prepare.py --source synthetic --target data/world --scenes 400 --tile 128

SOURCE is a folder in OpenEarthMap's layout (resized to 512 and cut to 256 as in the paper), a plain folder with images/,
labels/, classes.json, train.txt and val.txt, or a folder of images without labels.  The same command again continues a store
that was interrupted, and does nothing to a finished one; with --append it adds what is new.
"""

import json
import sys
from collections.abc import Sequence

from raysed.cli import Parser, main
from raysed.cluster.prepare import Settings, prepare, synthetic
from raysed.errors import UsageError
from raysed.io.sources import Rule, find, remapped
from raysed.io.storage import Storage


def job(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--source", required=True, help="folder or s3:// prefix of the images, or `synthetic`"
    )
    parser.add_argument("--target", required=True, help="tile store to make: a folder or s3:// prefix")
    parser.add_argument(
        "--resize",
        help="side every source is resized to, pixels, or none (default: 512 for OpenEarthMap's layout)",
    )
    parser.add_argument(
        "--tile", type=int, default=256, help="side of the windows cut, pixels (default: 256)"
    )
    parser.add_argument(
        "--store", type=int, help="side of the tiles stored, pixels (default: that of --tile)"
    )
    parser.add_argument(
        "--bands",
        metavar="R,G,B",
        help="numbers of the bands that are red, green and blue, from 1 (default: images have these three only)",
    )
    parser.add_argument(
        "--stretch",
        metavar="LO,HI",
        help="values of 16-bit images that become 0 and 255, linearly (default: images have 8 bits)",
    )
    parser.add_argument("--classes", metavar="FILE", help="classes.json to use instead of the source's own")
    parser.add_argument(
        "--remap",
        metavar="FILE",
        help="a classes.json of the classes wanted, with `map`: what each class of the source becomes",
    )
    parser.add_argument(
        "--append",
        action="store_true",
        help="add the sources that the store does not hold yet; runs that used it as it was stay valid",
    )
    parser.add_argument(
        "--scenes", type=int, default=200, help="scenes of the synthetic world, 256 px each (default: 200)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic world (default: 0)")
    parser.add_argument(
        "--bad-budget", type=float, default=0.01, help="share of sources that may be unusable (default: 0.01)"
    )
    parser.add_argument(
        "--shared-filesystem", action="store_true", help="all nodes of the cluster see the same files"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON line on standard output"
    )
    args = parser.parse(argv)
    if args.source == "synthetic":
        root, layout = None, synthetic(args.scenes)
    else:
        root = Storage(args.source)
        layout = find(root, args.classes)
    if args.remap:
        layout = remapped(layout, args.remap)
    settings = Settings(
        resize=_resize(args.resize, layout.kind),
        tile=args.tile,
        store=args.store,
        seed=args.seed,
        rule=Rule(_numbers("--bands", args.bands), _numbers("--stretch", args.stretch)),
    )

    def say(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    result = prepare(
        root,
        layout,
        args.target,
        settings,
        append=args.append,
        bad_budget=args.bad_budget,
        shared_filesystem=args.shared_filesystem,
        say=say,
    )
    if args.json:
        print(json.dumps(result))


def _resize(text: str | None, kind: str) -> int | None:
    if text is None:
        return 512 if kind == "openearthmap" else None
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--resize must be a number of pixels or none, got {text!r}") from None


def _numbers(flag: str, text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(n) for n in text.split(","))
    except ValueError:
        raise UsageError(f"{flag} must be whole numbers with commas between, got {text!r}") from None


if __name__ == "__main__":
    main(job)
