"""How a request becomes an answer: `engine` knows no transport, everything else here is one."""

VERSION = "0.1.0"
