// Package local is the edge's own MQTT broker for the devices around it.
//
// What a device publishes on a topic that the configuration maps to a stream is on disk before its PUBACK goes out, and
// from then on delivered or ledgered. Everything is fanned out to local subscribers and offered to the models' bindings.
//
// A message that its stream can't take now, as its quota with policy refuse or the disk is full, gets no PUBACK, and its connection
// ends: the device keeps it and tries again. One that its stream can never take, as it is too large, must not be tried again for
// ever, or nothing else of its device would come through. MQTT 5 has an answer for that: reason code 0x97 (quota exceeded). An
// earlier protocol has none: such a message is acknowledged, not stored, and ledgered as lost with the reason TooLarge, so that what
// devices believe accepted is still what is delivered and what is ledgered. Either way it is counted, logged at most once a
// minute for each stream, and neither fanned out nor offered to models.
package local
