"""`switchkd data`: `check` says what of a training set is broken, `convert` makes one, `download` fetches one."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from switchkd.export.contract.pixels import Preprocessing
from switchkd.export.llava.projectors import tokens_per_picture

from .data.check import check_data, percent
from .data.conversations import DataError
from .data.label_mask import ConversationEncoder
from .data.records import check_is_text
from .models.vlm import ModelError
from .preparation.report import lines, report
from .process.terminal import quiet_libraries
from .recipe.recipe import CHECKS, DATA_CHECK, DataRecipe, Recipe, RecipeError, load_recipe

ERRORS: tuple[type[Exception], ...] = (RecipeError, ModelError, DataError)
RECORDS = (".json", ".jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="check|convert|download")
    check = actions.add_parser("check", help="count, find what is broken, measure lengths; exit code 1 if untrainable")
    check.add_argument(
        "target", nargs="+", metavar="RECIPE [KEY=VALUE ...] | RECORDS ...", help="a recipe, or .json and .jsonl files"
    )
    check.add_argument("--pictures", default=None, help="the pictures' folder; a recipe names its own")
    check.add_argument("--check", choices=CHECKS, default=None, help="decode every picture, or look at headers alone")
    check.add_argument("--max-broken", type=float, default=None, help="the share of broken records that is allowed")
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    check.add_argument(
        "--list", type=Path, default=None, metavar="FILE", help="write every broken record as JSON lines"
    )
    convert = actions.add_parser("convert", help="turn other formats into LLaVA JSON; exit code 1 if many are refused")
    convert.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help=".json, .jsonl, .parquet, .arrow, .csv, a folder of a saved data set, or the name of one on the hub",
    )
    convert.add_argument("--out", type=Path, required=True, metavar="FILE", help="what to write: FILE.json or .jsonl")
    convert.add_argument(
        "--pictures", type=Path, default=None, metavar="DIR", help="for pictures inside of tables (FILE-pictures)"
    )
    convert.add_argument("--split", default="train", help="of a data set with several (%(default)s)")
    convert.add_argument("--name", default=None, help="of a data set on the hub with several configurations")
    convert.add_argument("--max-broken", type=float, default=0.01, help="the share that may be refused (%(default)s)")
    download = actions.add_parser("download", help="list the public sets, or fetch them")
    download.add_argument("names", nargs="*", metavar="NAME", help="what to fetch, or all; without one they are listed")
    download.add_argument("--to", type=Path, default=Path("data/llava"), help="the folder (%(default)s)")
    download.add_argument("--remove-archives", action="store_true", help="delete each archive once it is unpacked")
    download.add_argument("--verify", action="store_true", help="hash what is already there once more")


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 where a check found more broken records than allowed."""
    quiet_libraries()
    return {"check": _check, "convert": _convert, "download": _download}[args.action](args)


def _check(args: argparse.Namespace) -> int:
    changes = {
        name: value
        for name, value in (("pictures", args.pictures), ("check", args.check), ("max_broken", args.max_broken))
        if value is not None
    }
    sets = _sets(args.target)
    if args.list is not None:
        args.list.unlink(missing_ok=True)
    reports: list[dict[str, Any]] = []
    for names, given, recipe in sets:
        data = replace(given, **changes)
        encoder, reason = _encoder(recipe, data)
        memory = None if recipe is None else Path(recipe.output) / DATA_CHECK
        found = check_data(data, encoder, memory, None if recipe is None else _preprocessing(recipe))
        trainable = found.share <= data.max_broken and len(found.broken) < len(found.records)
        if args.list is not None:
            with args.list.open("a", encoding="utf-8", errors="replace") as file:
                file.writelines(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in found.broken.values())
        rows = {"stages": names, "files": data.records, "pictures_folder": data.pictures, "trainable": trainable}
        reports.append(
            rows | {"max_broken": data.max_broken, "no_tokens_because": reason} | report(found, data.max_length)
        )
    if args.json:
        print(json.dumps({"sets": reports}, indent=1))
    else:
        print("\n\n".join(_text(each) for each in reports))
    return 0 if all(each["trainable"] for each in reports) else 1


def _text(found: dict[str, Any]) -> str:
    title = ", ".join(found["files"]) + f", pictures in {found['pictures_folder'] or '.'}"
    stages = f"stage {', '.join(found['stages'])}: " if found["stages"] else ""
    unknown = found["no_tokens_because"]
    verdict = "trainable" if found["trainable"] else "not trainable"
    return "\n".join(
        [
            stages + title,
            *lines(found),
            *(["", f"tokens are not counted: {unknown}"] if unknown else []),
            "",
            f"{verdict}: {percent(found['left_out_share'])} broken, {100 * found['max_broken']:g} % allowed",
        ]
    )


def _sets(target: list[str]) -> list[tuple[list[str], DataRecipe, Recipe | None]]:
    """Each different training set, with the stages that train on it and their recipe."""
    first = Path(target[0])
    if first.is_file():
        check_is_text(first)  # what is no text is no recipe either
    if first.suffix.lower() in RECORDS:
        return [([], DataRecipe(target), None)]
    recipe = load_recipe(target[0], target[1:])
    sets: dict[str, tuple[list[str], DataRecipe, Recipe | None]] = {}
    for stage in recipe.stages:
        sets.setdefault(repr(stage.data), ([], stage.data, recipe))[0].append(stage.name)
    return list(sets.values())


def _encoder(recipe: Recipe | None, data: DataRecipe) -> tuple[ConversationEncoder | None, str | None]:
    """How the recipe's student reads conversations, without loading it; or why that is not known."""
    if recipe is None:
        return None, "records alone name no model; give a recipe"
    from transformers import LlavaProcessor

    from .models.vlm import IMAGE_TOKEN, complete_processor, load_tokenizer
    from .recipe.model_sizes import student_config

    try:
        config = student_config(recipe)
        if recipe.model.checkpoint is None:
            tokenizer, image_token = load_tokenizer(str(recipe.model.language_model)), IMAGE_TOKEN
        else:
            processor = LlavaProcessor.from_pretrained(recipe.model.checkpoint, backend="pil")
            complete_processor(processor, config)
            tokenizer, image_token = processor.tokenizer, processor.image_token
    except (ModelError, OSError) as error:
        return None, " ".join(str(error).split())
    return ConversationEncoder(tokenizer, image_token, tokens_per_picture(config), data.max_length), None


def _convert(args: argparse.Namespace) -> int:
    from .preparation.convert import convert, refused_list

    out: Path = args.out
    pictures: Path = args.pictures or out.with_name(f"{out.stem}-pictures")
    tally = convert(args.sources, out, pictures, split=args.split, name=args.name)
    print(f"{out}: {tally.written:,} records", end="")
    print(f", {tally.pictures_written:,} pictures in {pictures}" if tally.pictures_written else "")
    if tally.pictures_named:
        print(f"{tally.pictures_named:,} records name files that they came with; data.pictures is where those lie")
    if tally.refused:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in tally.refused.most_common())
        share = percent(tally.share_refused)
        print(f"{tally.refused.total():,} refused ({share}): {reasons}; all of them: {refused_list(out)}")
    return 0 if tally.share_refused <= args.max_broken else 1


def _preprocessing(recipe: Recipe) -> Preprocessing | None:
    """How the recipe's student prepares pictures, or None where that is not known: training tells why."""
    from transformers import AutoImageProcessor

    source = recipe.model.checkpoint or recipe.model.encoder
    try:
        return Preprocessing.from_config(AutoImageProcessor.from_pretrained(source, backend="pil").to_dict())
    except (ValueError, OSError):  # transformers' for a folder without settings, and PictureError
        return None


def _download(args: argparse.Namespace) -> int:
    from .preparation.download import PUBLIC, fetch

    if not args.names:
        print(f"{'name':<18} {'size':>8}  what, and whose terms hold")
        for download in PUBLIC:
            print(f"{download.name:<18} {download.size or '':>8}  {download.what}; {download.page}")
            if download.by_hand:
                print(f"{'':<28}by hand: {download.by_hand}")
        print("\nTo fetch: switchkd data download NAME ... (or all), to --to data/llava. Sizes are the publishers'.")
        return 0
    known = {download.name: download for download in PUBLIC}
    chosen = list(known) if args.names == ["all"] else args.names
    for name in chosen:
        if name not in known:
            raise DataError(f"there is no public set {name!r}; there are: {', '.join(known)}, all")
    for name in chosen:
        done = fetch(known[name], args.to, remove_archive=args.remove_archives, verify=args.verify)
        print(done, flush=True)
    return 0
