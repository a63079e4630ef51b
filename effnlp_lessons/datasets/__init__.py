"""The data of the course: fetched once, verified, and read from disk afterwards.

`sources` fetches what `data/sources.toml` lists and finds it again; `reviews`, `general_text`, `digits`, `shakespeare`
and `byte_corpus` load it; `tokenizer` cuts text into MiniLM's word pieces. Nothing is fetched when data are loaded.
"""
