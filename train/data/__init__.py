"""Bytes to batches: corpora, their vocabularies, and the windows that a step trains on.

The corpora are tensorflow-datasets builders, stored as ArrayRecord, with no TensorFlow:

    enwik8.py       Enwik8        100,000,000 bytes of Wikipedia, split in order
    pycode.py       Pycode        Python source of five pinned wheels, split by file
    codeparrot.py   Codeparrot    local shards of codeparrot-clean, split by file
    text.py         Text          the user's own file or folder

Every builder yields records {"text": bytes, "name": str, "index": int64}; the texts of a split, in
the order of their index and with nothing between them, are the split, byte for byte. The builders
are imported only to prepare a corpus: what needs no tensorflow-datasets (where the pinned corpora
come from, which files a user's path names) stands in `pinned.py` and `user_files.py`.
"""
