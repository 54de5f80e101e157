// What OpenAI's own client for JavaScript gets from the gateway whose address is its only argument, as JSON on stdout.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "k", maxRetries: 0 });
const messages = [{ role: "user", content: "one two three" }];
const found = {};

found.models = (await client.models.list()).data.map((model) => model.id);

const whole = await client.chat.completions.create({ model: "m", messages });
found.chat = [whole.choices[0].message.content, whole.usage.completion_tokens];

const stream = await client.chat.completions.create({
  model: "m",
  messages,
  stream: true,
  stream_options: { include_usage: true },
});
found.stream = { text: "", usage: null, ids: [] };
for await (const event of stream) {
  found.stream.text += event.choices[0]?.delta?.content ?? "";
  found.stream.usage = event.usage?.completion_tokens ?? found.stream.usage;
  found.stream.ids.push(event.id);
}
found.stream.ids = new Set(found.stream.ids).size;

const response = await client.responses.create({ model: "m", input: "hi" });
found.response = response.output_text;
found.events = [];
for await (const event of await client.responses.create({ model: "m", input: "hi", stream: true })) {
  found.events.push(event.type);
}

const embeddings = await client.embeddings.create({ model: "m", input: ["one", "two"], encoding_format: "float" });
found.embeddings = embeddings.data.map((item) => item.embedding);

async function refused(name, call) {
  try {
    await call();
    found[name] = "not refused";
  } catch (error) {
    found[name] = [error.constructor.name, error.status, error.code, error.param];
  }
}
await refused("unknownModel", () => client.chat.completions.create({ model: "nobody", messages }));
await refused("badParameter", () => client.chat.completions.create({ model: "m", messages, stream: "yes" }));

const aborted = await client.chat.completions.create({ model: "m", messages, stream: true, user: "leaves early" });
for await (const event of aborted) {
  if (event.choices[0]?.delta?.content) break;
}
found.leftEarly = true;

console.log(JSON.stringify(found));
