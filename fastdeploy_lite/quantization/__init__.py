"""Weight formats and their encoders: CCQ (2 bits), int8 and int4, in plain numpy."""
