// Package mqttconn keeps one MQTT connection to a broker, with a fresh client id and a clean session each time.
package mqttconn
