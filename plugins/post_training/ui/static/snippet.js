// Python that loads a checkpoint.

/**
 * Return the code for a checkpoint's `path`: its model in MLflow, or a folder. `runUrl` is the page of its run,
 * below the address of MLflow. Where the job's `params` say that it left an adapter, so does the code: such a
 * checkpoint names a base that lies on the trainer's machine.
 */
export function loadSnippet(path, runUrl, params) {
  const server = path.startsWith("models:/") && runUrl ? runUrl.split("/#")[0] : null;
  return [
    "import mlflow",
    "",
    ...(server ? [`mlflow.set_tracking_uri(${JSON.stringify(server)})`] : []),
    ...(leavesAdapters(params)
      ? ['# The base lies where the trainer had it; elsewhere add base_model_path="FOLDER".']
      : []),
    `chat = mlflow.transformers.load_model(${JSON.stringify(path)})`, // a literal of Python, too
    'chat([{"role": "user", "content": "…"}], max_new_tokens=64)',
  ].join("\n");
}

function leavesAdapters(params) {
  const type = params["algorithm_config.type"] ?? params["runtime.adapter.type"]; // QAT's weights are merged
  return type === "LoRA" && params["runtime.export"] !== "merged";
}
