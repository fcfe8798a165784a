"""How a request becomes an answer: `engine` knows no transport, everything else here is one."""
