"""How a request becomes an answer: `engine` computes it, `render` and `files` write it, `http` and `oip` carry it.

Beside these folders is only what the protocols share; no method's code is imported here.
"""

VERSION = "0.1.0"
