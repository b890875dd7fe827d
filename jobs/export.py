"""Make a folder of a trained network that others can load.

    python jobs/export.py runs/first --target models/first
    python jobs/export.py s3://bucket/runs/first --target s3://bucket/models/first --onnx

Writes model.safetensors, config.json and README.md, the model's card.  `segmentation_models_pytorch.from_pretrained(folder)`
loads the networks of that library, jobs/predict.py all.  --onnx adds model.onnx (any batch, input scaling inside).
"""

from collections.abc import Sequence

from raysed.cli import Parser, main
from raysed.io.model import check_free, of_run, save, to_onnx
from raysed.io.storage import Storage
from raysed.report.card import card


def job(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory: a local path or s3://bucket/prefix")
    parser.add_argument("--target", required=True, help="folder or s3:// prefix to make")
    parser.add_argument(
        "--cycle", type=int, help="number of the cycle's folder (default: the newest whose weights verify)"
    )
    parser.add_argument(
        "--data",
        metavar="URI",
        help="the run's tile store, if it has moved: classes and scale are read from it",
    )
    parser.add_argument(
        "--onnx", action="store_true", help="also write ONNX and print how far it is from torch"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    args = parser.parse(argv)
    check_free(Storage(args.target), overwrite=args.overwrite)
    model = of_run(args.run, args.cycle, args.data)
    onnx, difference = to_onnx(model) if args.onnx else (None, None)
    uri = save(model, args.target, card(model.record, difference), overwrite=args.overwrite, onnx=onnx)
    miou = model.record.metrics.get("miou")
    print(
        f"{uri}: {model.record.arch} after cycle {model.record.cycle}"
        + (f", mIoU {miou:.3f}" if miou else "")
    )
    if difference is not None:
        print(f"onnx: largest difference of logits, onnxruntime from torch: {difference:.2e}")


if __name__ == "__main__":
    main(job)
