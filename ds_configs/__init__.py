"""DeepSpeed files users pick by name, copy and edit; installed as `mirai_ds.ds_configs`."""
