"""What a run tells: TensorBoard, files for machines, the screen."""
