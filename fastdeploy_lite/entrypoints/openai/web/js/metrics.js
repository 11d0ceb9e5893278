// Prometheus text to numbers.

/** Samples of a text as a map from name (labels included) to value. */
export function parseMetrics(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    if (!line || line.startsWith("#")) continue;
    const at = line.lastIndexOf(" ");
    samples.set(line.slice(0, at), Number(line.slice(at + 1)));
  }
  return samples;
}

/** Labels of the first sample of a metric. */
export function labelsOf(samples, name) {
  const found = [...samples.keys()].find((key) => key.startsWith(`${name}{`));
  if (!found) return {};
  return Object.fromEntries([...found.matchAll(/(\w+)="((?:\\.|[^"\\])*)"/g)].map((m) => [m[1], m[2]]));
}

/** Mean of a histogram, or null when nothing was observed. */
export function meanOf(samples, name) {
  const count = samples.get(`${name}_count`) ?? 0;
  return count > 0 ? samples.get(`${name}_sum`) / count : null;
}
