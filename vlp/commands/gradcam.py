"""``vlp gradcam``: draw Grad-CAM heat maps of the words of captions over their images."""

from __future__ import annotations

import argparse

from vlp.commands.code import add_code_options, read_code
from vlp.errors import UserError
from vlp.files import local_path


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "gradcam",
        help="draw Grad-CAM heat maps of caption words over their images (ALBEF)",
        epilog="example: vlp gradcam runs/albef-world --words red,left --images 4",
    )
    parser.add_argument("folder", metavar="RUN", type=local_path)
    parser.add_argument("--data", metavar="SHARDS", help="images with captions (default: the run's data.val)")
    parser.add_argument(
        "--words", default="", metavar="A,B", help="only captions with these words, and only these words"
    )
    parser.add_argument(
        "--images", "--pictures", type=int, default=6, metavar="N", help="images drawn at random (default: %(default)s)"
    )
    parser.add_argument("--layer", type=int, help="fusion layer, from 0 (default: a third of the way up)")
    parser.add_argument("--checkpoint", metavar="STEP", help="a step, 'best' or 'last' (default: best if there is one)")
    parser.add_argument("--output", type=local_path, metavar="PNG", help="default: RUN/gradcam.png")
    add_code_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from vlp.loading.run import load_run
    from vlp.tasks.grad_cam import draw_words

    own_types = read_code(options, options.folder).types
    loaded = load_run(options.folder, options.checkpoint, own_types=own_types)
    model = loaded.eval_model
    source, path = options.data or model.data.val, options.output or options.folder / "gradcam.png"
    if not source:
        raise UserError("gradcam has no images; give --data SHARDS")
    words = tuple(filter(None, options.words.split(",")))
    captions = draw_words(model, source, path, words, options.images, options.layer)
    print("\n".join([*captions, f"step {loaded.step}; wrote {path}"]))
    return 0
