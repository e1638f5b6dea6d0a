"""The house behind `anemoi_ckpt` and `strategies`: private, and free to change.

Each room imports only from those below it in this list. The ground floor imports torch and the
standard library alone, since `strategies` stands on it.

- ``cli``: the command line.
- ``trainers``: what plugs into Lightning's Trainer and anemoi-training.
- ``differing``, ``previewing``, ``verifying``, ``finding``: how two checkpoints differ, what a load
  would move, whether an object is whole, and which there are.
- ``report``, ``contents``: what a load did, and what a checkpoint holds, as users read it.
- ``provenance``: what a checkpoint tells of how it was made.
- ``trees``, ``pictures``: modules and what they take; trees and bars, as text and HTML.
- ``loading``: the loop that turns a place and strategies into a checkpoint.
- ``pinning``: a checkpoint that must have a SHA-256.
- ``saving``, ``metadata``, ``editing``: a checkpoint → a place; what Anemoi writes into its
  checkpoints; one record of an archive, without the others.
- ``planning``: an open checkpoint and strategies → their result, and the records it still needs.
- ``opening``, ``fetching``: a place → an open checkpoint; its records → storages, checked.
- ``cache``, ``downloading``, ``digests``: whole files, to a disk.
- ``blocks``: a file whose first and last bytes came at once, which reads on from there.
- ``installing``, ``matching``: a state dict → a model, all of it or nothing; ``hooks``: what else
  its own hook takes from a checkpoint.
- ``ranks``: many processes of one job, which read each byte once.
- ``parallel``, ``transport``, ``threads``, ``progress``: many ranges at once, and one policy of
  retries, in threads that a Ctrl-C ends.
- ``hollow``: which records a tensor has its values from.
- ``formats``: a module for each format. A format knows no places.
- ``places``: a module for each store. A place knows no formats.
- ``migrating``: Anemoi's own scripts that bring a checkpoint up to date.
- ``pickles``: the machine that reads pickles, and what it does not know as inert data.
- ``tables``: how results print.
- ``unpacking``: how much may come of compressed bytes.
- ``aliases``: where `import anemoi_ckpt.strategies` finds the module.
- Ground floor: ``ordering`` (strategies that align variables, or refuse another order),
  ``resuming`` and ``steps`` (what a strategy tells of itself), ``configurations`` (what Anemoi's
  say of channels), ``combining`` (means and unions of state dicts), ``misplaced`` (weights that
  would be another variable's), ``aligning``, ``layouts``, ``leads`` and ``alignment`` (weights
  follow their variables and steps; what Anemoi's models have over variables), ``edges``,
  ``graphs`` and ``nodes`` (values follow their edges; those of other edges and nodes are refused),
  ``processors`` and ``methods`` (the statistics in Anemoi's models, and what has none),
  ``freezing``, ``renaming``, ``comparing`` and ``arguments`` (what strategies share), ``calls``
  (what all public calls do alike), ``leadtimes`` and ``describing`` (what Anemoi's metadata say of
  steps and of variables), ``tensors`` (new values in a state dict), ``globs`` (how names are
  chosen), ``anatomy`` (where a checkpoint keeps what), ``variables`` (what Anemoi's weights run
  over), ``compat`` (what differs between versions of torch and Python), ``errors``.
"""
