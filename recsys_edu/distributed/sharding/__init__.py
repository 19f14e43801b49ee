"""Sharding types, one file each: a picture, what it costs, the rectangles it makes, and its forward by hand.

Read in this order:

    tiling             Shard, validate, draw: what all the others are made of
    table_wise         the whole table on one rank
    row_wise           blocks of rows over ranks; parts are added
    column_wise        blocks of columns over ranks; pieces lie side by side
    table_row_wise     rows over one host: parts are added inside it
    table_column_wise  columns over one host
    grid               columns over hosts, rows inside each
    data_parallel      a copy everywhere

The engine takes nothing from here but the list of rectangles. The functions called `..._by_hand` are what it has to
equal: a world of ranks in one process, written out with masks and `F.embedding_bag`, all with the arguments
`(batches, weight_RD, shards, pooling)`.
"""
