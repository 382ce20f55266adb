"""The fast paths of the tokenizer, compiled by Numba. Only `transformerlm.tokenizer.compiled` imports them."""
