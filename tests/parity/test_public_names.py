"""Every public name of TorchRec's modules, models, datasets, optimizers and metrics is found here at the same place."""

from __future__ import annotations

import importlib

import pytest

# Module path below the package, and the names a program may import from it.
PUBLIC_NAMES = {
    "modules.embedding_configs": """
        PoolingType BaseEmbeddingConfig EmbeddingTableConfig EmbeddingBagConfig EmbeddingConfig QuantConfig
        dtype_to_data_type data_type_to_dtype data_type_to_sparse_type pooling_type_to_pooling_mode
        pooling_type_to_str
    """,
    "modules.embedding_modules": """
        EmbeddingBagCollectionInterface EmbeddingBagCollection EmbeddingCollectionInterface
        EmbeddingCollection get_embedding_names_by_table reorder_inverse_indices process_pooled_embeddings
    """,
    "modules.mlp": """
        Perceptron MLP
    """,
    "modules.crossnet": """
        CrossNet LowRankCrossNet VectorCrossNet LowRankMixtureCrossNet
    """,
    "modules.deepfm": """
        DeepFM FactorizationMachine
    """,
    "modules.activation": """
        SwishLayerNorm
    """,
    "modules.feature_processor": """
        BaseFeatureProcessor PositionWeightedModule BaseGroupedFeatureProcessor PositionWeightedProcessor
        offsets_to_range_traceble
    """,
    "modules.feature_processor_": """
        FeatureProcessor PositionWeightedModule FeatureProcessorsCollection PositionWeightedModuleCollection
    """,
    "modules.fp_embedding_modules": """
        FeatureProcessorDictWrapper FeatureProcessedEmbeddingBagCollection apply_feature_processors_to_kjt
    """,
    "modules.fused_embedding_modules": """
        FusedEmbeddingBagCollection FusedEmbeddingCollection fuse_embedding_optimizer
        convert_optimizer_type_and_kwargs
    """,
    "modules.lazy_extension": """
        LazyModuleExtensionMixin lazy_apply
    """,
    "modules.regroup": """
        KTRegroupAsDict PermuteMultiEmbedding
    """,
    "modules.embedding_tower": """
        EmbeddingTower EmbeddingTowerCollection tower_input_params
    """,
    "modules.mc_modules": """
        ManagedCollisionModule ManagedCollisionCollection MCHManagedCollisionModule MCHEvictionPolicy
        MCHEvictionPolicyMetadataInfo LFU_EvictionPolicy LRU_EvictionPolicy DistanceLFU_EvictionPolicy
        average_threshold_filter dynamic_threshold_filter probabilistic_threshold_filter apply_mc_method_to_jt_dict
    """,
    "modules.hash_mc_modules": """
        HashZchManagedCollisionModule
    """,
    "modules.hash_mc_evictions": """
        HashZchEvictionPolicyName HashZchEvictionConfig HashZchEvictionScorer HashZchSingleTtlScorer
        HashZchPerFeatureTtlScorer HashZchEvictionModule get_eviction_scorer get_kernel_from_policy
    """,
    "modules.mc_embedding_modules": """
        BaseManagedCollisionEmbeddingCollection ManagedCollisionEmbeddingCollection
        ManagedCollisionEmbeddingBagCollection evict
    """,
    "modules.mc_adapter": """
        McEmbeddingCollectionAdapter McEmbeddingBagCollectionAdapter
    """,
    "modules.object_pool": """
        ObjectPool
    """,
    "modules.tensor_pool": """
        TensorPool
    """,
    "modules.keyed_jagged_tensor_pool": """
        KeyedJaggedTensorPool
    """,
    "distributed.mc_modules": """
        ManagedCollisionCollectionSharder ShardedManagedCollisionCollection
    """,
    "distributed.mc_embedding_modules": """
        BaseManagedCollisionEmbeddingCollectionSharder BaseShardedManagedCollisionEmbeddingCollection
    """,
    "distributed.mc_embeddingbag": """
        ManagedCollisionEmbeddingBagCollectionSharder ShardedManagedCollisionEmbeddingBagCollection
    """,
    "distributed.mc_embedding": """
        ManagedCollisionEmbeddingCollectionSharder ShardedManagedCollisionEmbeddingCollection
    """,
    "distributed.tensor_pool": """
        ShardedTensorPool TensorPoolSharder
    """,
    "distributed.keyed_jagged_tensor_pool": """
        ShardedKeyedJaggedTensorPool KeyedJaggedTensorPoolSharder
    """,
    "distributed.types": """
        ObjectPoolShardingPlan ObjectPoolShardingType
    """,
    "inference.state_dict_transform": """
        state_dict_gather state_dict_all_gather_keys state_dict_to_device
    """,
    "modules.utils": """
        extract_module_or_tensor_callable get_module_output_dimension check_module_output_dimension
        construct_modulelist_from_single_module convert_list_of_modules_to_modulelist
        init_mlp_weights_xavier_uniform
    """,
    "models.dlrm": """
        choose SparseArch DenseArch InteractionArch InteractionDCNArch InteractionProjectionArch OverArch
        DLRM DLRM_Projection DLRM_DCN DLRMTrain DLRMWrapper
    """,
    "models.deepfm": """
        SparseArch DenseArch FMInteractionArch OverArch SimpleDeepFMNN SimpleDeepFMNNWrapper
    """,
    "models.experimental.transformerdlrm": """
        InteractionTransformerArch DLRM_Transformer
    """,
    "datasets.utils": """
        Batch idx_split_train_val rand_split_train_val safe_cast Limit ReadLinesFromCSV LoadFiles
        ParallelReadConcat
    """,
    "datasets.random": """
        RandomRecDataset
    """,
    "datasets.criteo": """
        INT_FEATURE_COUNT CAT_FEATURE_COUNT DAYS DEFAULT_LABEL_NAME DEFAULT_INT_NAMES DEFAULT_CAT_NAMES
        DEFAULT_COLUMN_NAMES CriteoIterDataPipe criteo_terabyte criteo_kaggle BinaryCriteoUtils
        InMemoryBinaryCriteoIterDataPipe
    """,
    "datasets.movielens": """
        DEFAULT_RATINGS_COLUMN_NAMES DEFAULT_MOVIES_COLUMN_NAMES DEFAULT_COLUMN_NAMES
        movielens_20m movielens_25m
    """,
    "optim.keyed": """
        KeyedOptimizer CombinedOptimizer KeyedOptimizerWrapper OptimizerWrapper
    """,
    "optim.clipping": """
        GradientClipping GradientClippingOptimizer
    """,
    "optim.warmup": """
        WarmupPolicy WarmupStage WarmupOptimizer
    """,
    "optim.rowwise_adagrad": """
        RowWiseAdagrad
    """,
    "optim.fused": """
        FusedOptimizer EmptyFusedOptimizer FusedOptimizerModule
    """,
    "optim.optimizers": """
        SGD LarsSGD LAMB PartialRowWiseLAMB Adam PartialRowWiseAdam Adagrad in_backward_optimizer_filter
    """,
    "optim.apply_optimizer_in_backward": """
        apply_optimizer_in_backward
    """,
    "optim.semi_sync": """
        SemisyncOptimizer
    """,
    "metrics.metrics_config": """
        RecTaskInfo RecMetricEnum RecComputeMode RecMetricDef ThroughputDef MetricsConfig BatchSizeStage
        SessionMetricDef validate_batch_size_stages
    """,
    "metrics.rec_metric": """
        RecMetricComputation RecMetric RecMetricList RecMetricException MetricComputationReport WindowBuffer
    """,
    "metrics.metric_module": """
        RecMetricModule generate_metric_module StateMetric
    """,
    "metrics.metrics_namespace": """
        MetricNamespace MetricName MetricPrefix compose_metric_namespace compose_metric_key
        compose_customized_metric_key task_wildcard_metrics_pattern
    """,
    "metrics.model_utils": """
        parse_model_outputs parse_task_model_outputs parse_required_inputs session_ids_to_tensor
        is_empty_signals
    """,
    "metrics.ne": """
        NEMetric compute_cross_entropy compute_ne compute_logloss
    """,
    "metrics.auc": """
        AUCMetric compute_auc compute_auc_per_group
    """,
    "metrics.throughput": """
        ThroughputMetric
    """,
    "metrics.accuracy": """
        AccuracyMetric AccuracyMetricComputation
    """,
    "metrics.auprc": """
        AUPRCMetric AUPRCMetricComputation
    """,
    "metrics.average": """
        AverageMetric AverageMetricComputation
    """,
    "metrics.cali_free_ne": """
        CaliFreeNEMetric CaliFreeNEMetricComputation
    """,
    "metrics.calibration": """
        CalibrationMetric CalibrationMetricComputation
    """,
    "metrics.calibration_with_recalibration": """
        RecalibratedCalibrationMetric RecalibratedCalibrationMetricComputation
    """,
    "metrics.ctr": """
        CTRMetric CTRMetricComputation
    """,
    "metrics.gauc": """
        GAUCMetric GAUCMetricComputation
    """,
    "metrics.hindsight_target_pr": """
        HindsightTargetPRMetric HindsightTargetPRMetricComputation
    """,
    "metrics.mae": """
        MAEMetric MAEMetricComputation
    """,
    "metrics.mse": """
        MSEMetric MSEMetricComputation
    """,
    "metrics.multi_label_precision": """
        MultiLabelPrecisionMetric MultiLabelPrecisionMetricComputation
    """,
    "metrics.multiclass_recall": """
        MulticlassRecallMetric MulticlassRecallMetricComputation
    """,
    "metrics.ndcg": """
        NDCGMetric NDCGComputation
    """,
    "metrics.ne_positive": """
        NEPositiveMetric NEPositiveMetricComputation
    """,
    "metrics.ne_with_recalibration": """
        RecalibratedNEMetric RecalibratedNEMetricComputation
    """,
    "metrics.nmse": """
        NMSEMetric NMSEMetricComputation
    """,
    "metrics.num_missing_labels": """
        NumMissingLabelsMetric NumMissingLabelsMetricComputation
    """,
    "metrics.num_positive_samples": """
        NumPositiveSamplesMetric NumPositiveSamplesMetricComputation
    """,
    "metrics.output": """
        OutputMetric OutputMetricComputation
    """,
    "metrics.precision": """
        PrecisionMetric PrecisionMetricComputation
    """,
    "metrics.precision_session": """
        PrecisionSessionMetric PrecisionSessionMetricComputation
    """,
    "metrics.rauc": """
        RAUCMetric RAUCMetricComputation
    """,
    "metrics.recall": """
        RecallMetric RecallMetricComputation
    """,
    "metrics.recall_session": """
        RecallSessionMetric RecallSessionMetricComputation
    """,
    "metrics.scalar": """
        ScalarMetric ScalarMetricComputation
    """,
    "metrics.segmented_ne": """
        SegmentedNEMetric SegmentedNEMetricComputation
    """,
    "metrics.serving_calibration": """
        ServingCalibrationMetric ServingCalibrationMetricComputation
    """,
    "metrics.serving_ne": """
        ServingNEMetric ServingNEMetricComputation
    """,
    "metrics.sum_weights": """
        SumWeightsMetric SumWeightsMetricComputation
    """,
    "metrics.tensor_weighted_avg": """
        TensorWeightedAvgMetric TensorWeightedAvgMetricComputation
    """,
    "metrics.tower_qps": """
        TowerQPSMetric TowerQPSMetricComputation
    """,
    "metrics.unweighted_ne": """
        UnweightedNEMetric UnweightedNEMetricComputation
    """,
    "metrics.weighted_avg": """
        WeightedAvgMetric WeightedAvgMetricComputation
    """,
    "metrics.weighted_sum_predictions": """
        WeightedSumPredictionsMetric WeightedSumPredictionsMetricComputation
    """,
    "metrics.xauc": """
        XAUCMetric XAUCMetricComputation
    """,
}


@pytest.mark.parametrize("path", PUBLIC_NAMES)
def test_the_names_of_a_module_can_be_imported(path: str) -> None:
    try:
        module = importlib.import_module(f"recsys_edu.{path}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("recsys_edu"):
            raise
        pytest.skip(f"a third-party package of that module is missing: {error.name}")
    missing = [name for name in PUBLIC_NAMES[path].split() if not hasattr(module, name)]
    assert missing == []


@pytest.mark.parametrize("path", PUBLIC_NAMES)
def test_the_list_holds_names_that_torchrec_has(path: str) -> None:
    pytest.importorskip("torchrec")
    try:
        module = importlib.import_module(f"torchrec.{path}")
    except ModuleNotFoundError as error:
        pytest.skip(f"TorchRec's own module cannot be imported here: {error}")
    missing = [name for name in PUBLIC_NAMES[path].split() if not hasattr(module, name)]
    assert missing == []
