"""Every method's loss: tensors in, tensors out. plain.py is the place to begin, table.py names them all.

Of the rest of the project these files, like cma.py and discriminator.py, import only each other and, of files/, the
error type and `flag`: no tokenizer, no model, no file. (What seqkd adds to cross-entropy is files: running/answers.py.)
"""
