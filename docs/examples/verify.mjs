// Check that a webhook is from Ralf: Standard Webhooks 1.0, in Node without any package.
//
//     WEBHOOK_SECRETS="whsec_…" node docs/examples/verify.mjs < request.json
//
// Reads {"headers": {…}, "body": "…"}; exits 0 when one of the secrets signed it, else 1.
import { createHmac, timingSafeEqual } from "node:crypto";
import { readFileSync } from "node:fs";

const TOLERANCE_S = 300;

export function verified(secrets, body, headers, now = Date.now() / 1000) {
  const id = headers["webhook-id"], at = headers["webhook-timestamp"];
  if (!id || !/^\d+$/.test(at ?? "") || Math.abs(now - Number(at)) > TOLERANCE_S) return false;
  const given = (headers["webhook-signature"] ?? "").split(" ")
    .filter((part) => part.startsWith("v1,"))
    .map((part) => Buffer.from(part.slice(3), "base64"));
  return secrets.some((secret) => {
    const key = Buffer.from(secret.replace(/^whsec_/, ""), "base64");
    const made = createHmac("sha256", key).update(`${id}.${at}.`).update(body).digest();
    return given.some((each) => each.length === made.length && timingSafeEqual(each, made));
  });
}

if (import.meta.url === `file://${process.argv[1]}`) {
  const { headers, body } = JSON.parse(readFileSync(0, "utf8"));
  process.exit(verified(process.env.WEBHOOK_SECRETS.split(" "), body, headers) ? 0 : 1);
}
