// Package topic formats and parses the MQTT topic names that cloud hubs, edge hubs and devices share.
package topic
