"""The verb merge: an adapter added to its base's files, shard by shard."""
