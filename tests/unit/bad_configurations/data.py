"""Datasets, tokenizers, conversations and checkpoints that a run cannot use."""

from __future__ import annotations

from .case import Bad

DATA = {
    "number for a switch": Bad(
        ("checkpoint.resume=1",), "checkpoint.resume", "1", "give true or false"
    ),
    "missing tokenizer": Bad(
        ("data.tokenizer={tmp}/no.model",), "data.tokenizer", "no.model", "give a SentencePiece"
    ),
    "file that is no tokenizer": Bad(
        ("data.tokenizer={tmp}/notes.txt",), "data.tokenizer", "notes.txt", "give a .model file"
    ),
    "folder that holds no tokenizer": Bad(
        ("data.tokenizer={tmp}/step_00000007",),
        "data.tokenizer",
        "step_00000007",
        "give a folder with tokenizer.json",
    ),
    "Hugging Face tokenizer that is not JSON": Bad(
        ("data.tokenizer={tmp}/broken",),
        "data.tokenizer",
        "broken",
        "give a folder with tokenizer.json",
    ),
    "Hugging Face tokenizer that does not end texts": Bad(
        ("data.tokenizer={tmp}/endless",), "data.tokenizer", "endless", "give a folder"
    ),
    "dataset too small to hold documents out": Bad(
        ("data.blend=[{path:{tmp}/small,weight:1}]",),
        "data.blend[0].path",
        "small",
        "choose another data.held_out_percent",
    ),
    "dataset cut short": Bad(
        ("data.blend=[{path:{tmp}/short,weight:1}]",),
        "data.blend[0].path",
        "short",
        "make it with tools/preprocess_data.py",
    ),
    "file that is no dataset": Bad(
        ("data.blend=[{path:{tmp}/notes,weight:1}]",),
        "data.blend[0].path",
        "notes",
        "make it with tools/preprocess_data.py",
    ),
    "evaluation without held-out text": Bad(
        ("data.held_out_percent=0",),
        "data.held_out_percent",
        "0.0",
        "schedule.evaluation_interval=0",
    ),
    "missing dataset": Bad(
        ("data.blend=[{path:{tmp}/corpus,weight:1}]",),
        "data.blend[0].path",
        "corpus",
        "make it with tools/preprocess_data.py",
    ),
    "blend without its tokenizer": Bad(
        ("data.blend=[{path:{tmp}/corpus,weight:1}]",),
        "data.tokenizer",
        "null",
        "name the tokenizer that they were made with",
    ),
    "blend with a weight of zero": Bad(
        ("data.blend=[{path:{tmp}/corpus,weight:0}]",),
        "data.blend[0].weight",
        "0.0",
        "choose above 0",
    ),
    "source without dataset or name": Bad(
        ("data.blend=[{weight:1}]",),
        "data.blend[0].path",
        "null",
        "give path or paths, or a source",
    ),
    "source that the built-in text lacks": Bad(
        ("data.blend=[{source:books}]",),
        "data.blend[0].source",
        "books",
        "or choose python_standard_library or six_languages",
    ),
    "two sources of one name": Bad(
        ("data.blend=[{source:six_languages},{source:six_languages}]",),
        "data.blend[1].source",
        "six_languages",
        "a name of its own",
    ),
    "dataset in two sources": Bad(
        ("data.blend=[{path:{tmp}/small},{source:b,paths:[{tmp}/notes,{tmp}/small]}]",),
        "data.blend[1].paths[1]",
        "small",
        "name it once",
    ),
    "dataset of a source that is missing": Bad(
        ("data.blend=[{source:b,paths:[{tmp}/small,{tmp}/corpus]}]",),
        "data.blend[0].paths[1]",
        "corpus",
        "make it with tools/preprocess_data.py",
    ),
    "built-in text among datasets": Bad(
        ("data.blend=[{path:{tmp}/small},{source:six_languages}]",),
        "data.blend",
        "small, six_languages",
        "give every source a path, or none",
    ),
    "dataset smaller than a sample": Bad(
        ("data.blend=[{path:{tmp}/small}]", "data.held_out_percent=10"),
        "data.blend[0].path",
        "small",
        "choose data.sequence_length=54 or less",
    ),
    "weights that are all zero": Bad(
        ("data.blend=[{source:six_languages,weight:0}]",),
        "data.blend",
        "six_languages: 0.0",
        "give at least one source a weight above 0",
    ),
    "infinite weight": Bad(
        ("data.blend=[{source:six_languages,weight:inf}]",),
        "data.blend",
        "six_languages: inf",
        "none an infinite one",
    ),
    "source that no part of the run uses": Bad(
        (
            "data.blend=[{source:six_languages},{source:python_standard_library,weight:0}]",
            "data.blend_changes=[{tokens:1e6,weights:{six_languages:2}}]",
        ),
        "data.blend[1].weight",
        "0.0",
        "give it a weight in data.blend_changes, or leave it out",
    ),
    "mixture changes out of order": Bad(
        (
            "data.blend_changes=[{tokens:2e6,weights:{six_languages:1}},"
            "{tokens:2e6,weights:{six_languages:2}}]",
        ),
        "data.blend_changes[1].tokens",
        "2000000.0",
        "by growing tokens",
    ),
    "mixture change at no tokens": Bad(
        ("data.blend_changes=[{tokens:0,weights:{six_languages:1}}]",),
        "data.blend_changes[0].tokens",
        "0.0",
        "choose above 0",
    ),
    "mixture change of an unknown source": Bad(
        ("data.blend_changes=[{tokens:1e6,weights:{six_language:1}}]",),
        "data.blend_changes[0].weights.six_language",
        "1.0",
        "did you mean six_languages?",
    ),
    "mixture change to nothing": Bad(
        ("data.blend_changes=[{tokens:1e6,weights:{six_languages:0}}]",),
        "data.blend_changes[0].weights",
        "six_languages: 0.0",
        "give at least one source a weight above 0",
    ),
    "mixture change without sources": Bad(
        ("data.blend_changes=[{tokens:1e6,weights:{}}]",),
        "data.blend_changes[0].weights",
        "{}",
        "give at least one source a weight above 0",
    ),
    "negative weight in a mixture change": Bad(
        ("data.blend_changes=[{tokens:1e6,weights:{six_languages:-1}}]",),
        "data.blend_changes[0].weights.six_languages",
        "-1.0",
        "choose at least 0",
    ),
    "mixture change without a mapping": Bad(
        ("data.blend_changes=[{tokens:1e6,weights:[1,2]}]",),
        "data.blend_changes[0].weights",
        "[1, 2]",
        "write data.blend_changes[0].weights={name: …}",
    ),
    "two evaluation sets of one name": Bad(
        ("data.evaluation_sets=[{name:ko,path:{tmp}/notes.txt},{name:ko,path:{tmp}/notes.txt}]",),
        "data.evaluation_sets[1].name",
        "ko",
        "a name of its own",
    ),
    "missing evaluation set": Bad(
        ("data.evaluation_sets=[{name:ko,path:{tmp}/none}]",),
        "data.evaluation_sets[0].path",
        "none",
        "give a .jsonl, .txt or .parquet file",
    ),
    "evaluation set cut short": Bad(
        ("data.evaluation_sets=[{name:ko,path:{tmp}/short}]",),
        "data.evaluation_sets[0].path",
        "short",
        "an indexed dataset without its suffix",
    ),
    "missing conversations": Bad(
        ("data.conversations=[{tmp}/none.jsonl]",),
        "data.conversations[0]",
        "none.jsonl",
        "give a file of conversations",
    ),
    "conversations of an unknown kind": Bad(
        ("data.conversations=[{tmp}/notes.txt]",),
        "data.conversations[0]",
        "notes.txt",
        "give a .jsonl or .parquet file",
    ),
    "conversations both learnt and held out": Bad(
        (
            "data.conversations=[{tmp}/chat.jsonl]",
            "data.held_out_conversations=[{tmp}/chat.jsonl]",
        ),
        "data.held_out_conversations[0]",
        "chat.jsonl",
        "name it once",
    ),
    "held-out conversations alone": Bad(
        ("data.held_out_conversations=[{tmp}/chat.jsonl]",),
        "data.held_out_conversations",
        "chat.jsonl",
        "evaluate on text with data.evaluation_sets",
    ),
    "conversations beside text": Bad(
        ("data.conversations=[{tmp}/chat.jsonl]", "data.blend=[{source:six_languages}]"),
        "data.blend",
        "given",
        "leave one of them out",
    ),
    "no conversations to evaluate on": Bad(
        ("data.conversations=[{tmp}/chat.jsonl]", "data.held_out_percent=0"),
        "data.held_out_percent",
        "0.0",
        "schedule.evaluation_interval=0",
    ),
    "unknown policy for long conversations": Bad(
        ("data.chat.too_long=split",), "data.chat.too_long", "split", "drop or truncate or error"
    ),
    "expert biases reset without a checkpoint": Bad(
        ("checkpoint.reset_expert_bias=true",),
        "checkpoint.reset_expert_bias",
        "true",
        "set checkpoint.load",
    ),
    "checkpoint that is not whole": Bad(
        ("checkpoint.load={tmp}",), "checkpoint.load", "", "name a step_… folder"
    ),
    "checkpoint with damaged settings": Bad(
        ("checkpoint.load={tmp}/step_00000005",),
        "checkpoint.load",
        "step_00000005",
        "name a step_… folder",
    ),
    "no whole checkpoint left": Bad(
        ("output_dir={tmp}", "run_name=lost"),
        "checkpoint.directory",
        "lost/checkpoints",
        "put a copy of one of them back",
    ),
    "local tier without a folder": Bad(
        ("checkpoint.local_save_interval=5",),
        "checkpoint.local_directory, checkpoint.local_save_interval",
        "null, 5",
        "set both",
    ),
    "local tier among the checkpoints": Bad(
        (
            "output_dir={tmp}",
            "run_name=new",
            "checkpoint.local_directory={tmp}/new/checkpoints/local",
            "checkpoint.local_save_interval=5",
        ),
        "checkpoint.local_directory",
        "new/checkpoints/local",
        "name a folder on a disk of the node",
    ),
    "time limit of what holds up training": Bad(
        ("checkpoint.save_time_limit=5", "checkpoint.asynchronous=false"),
        "checkpoint.save_time_limit",
        "5.0",
        "set checkpoint.asynchronous=true",
    ),
    "unknown part of a checkpoint": Bad(
        ("checkpoint.load={tmp}/step_00000007", "checkpoint.load_what=moments"),
        "checkpoint.load_what",
        "moments",
        "choose everything or weights or weights_and_optimizer",
    ),
    "part of no checkpoint": Bad(
        ("checkpoint.load_what=weights",), "checkpoint.load_what", "weights", "set checkpoint.load"
    ),
    "going on with samples of another length": Bad(
        ("checkpoint.load={tmp}/step_00000007", "data.sequence_length=64"),
        "data.sequence_length",
        "64",
        "choose 128, or begin a run of its own at step 0 with checkpoint.load_what=weights",
    ),
    "going on with another mixture of what is done": Bad(
        (
            "checkpoint.load={tmp}/step_00000007",
            "data.blend_changes=[{tokens:6400,weights:{six_languages:1}}]",
        ),
        "data.blend_changes",
        "python_standard_library, six_languages",
        "keep the weights of what is done",
    ),
    "kept steps that are never saved": Bad(
        ("checkpoint.keep_every=70",), "checkpoint.keep_every", "70", "choose a multiple"
    ),
}
